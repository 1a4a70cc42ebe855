"""What `itm sweep` stands on. The format of sweep.json is named here."""

FORMAT = 1
