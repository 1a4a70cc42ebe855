"""Shards and a matcher -> the vectors that are searched: what the stage `itm index` stands on."""
