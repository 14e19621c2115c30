"""What the folder of a measurement holds."""
