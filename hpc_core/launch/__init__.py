"""Starting workers and ending everything they start. Never imports torch, nor what needs it."""
