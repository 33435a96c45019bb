"""The ground floor: the database, its tables, blobs, and disks that take no data."""
