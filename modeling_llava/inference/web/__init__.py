"""The chat in a browser: people kept apart (`sessions`), what they may send and fetch (`guard`), what they see (`page`)."""
