"""What `itm train` stands on. The format of run.json and started.json is named here, for those who read them without torch."""

FORMAT = 1
