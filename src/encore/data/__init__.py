"""From files to batches: documents and rows (`sources`), the batch (`batch`), and the way between (`pipeline`)."""
