"""A MODEL run again on recorded calls, from wherever a call can be resumed."""
