"""A MODEL run again on recorded calls, which are resumed midway where possible."""
