"""Files: what lies in a checkpoint folder, how it is read and locked, and why it cannot be loaded."""
