"""Values that cross borders: requests, block identity, costs, members, errors. No I/O."""
