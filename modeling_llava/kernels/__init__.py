"""What makes a step fast, each with its plain equivalent."""
