"""What a run takes, worked out from shapes alone: memory, bytes between nodes, operations and time."""
