"""The audit pool: manager, auditors, and what they measure."""
