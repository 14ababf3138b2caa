"""What a sweep would do and cost, without starting it."""
