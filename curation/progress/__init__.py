"""What long work says of itself, with its rate and the time left: bars on a terminal, JSON lines elsewhere."""
