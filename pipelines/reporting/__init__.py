"""What `itm report` and `itm explain` read for their pictures."""
