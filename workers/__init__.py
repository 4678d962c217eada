"""Everything Ray: tower actors, the augmentation fleet, the feed, and the command line `towers`."""
