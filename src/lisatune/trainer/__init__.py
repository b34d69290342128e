"""What ``LisaCallback`` needs of ``transformers.Trainer``: its processes, its checkpoint, its log."""
