"""What a sweep would do, cost and need, told without starting it."""
