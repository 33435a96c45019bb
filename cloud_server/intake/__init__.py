"""What agents send: uploads, the gates that a blob must pass, budgets."""
