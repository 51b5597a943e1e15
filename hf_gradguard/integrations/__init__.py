"""The few places where public events do not reach. Each stands in front of a method of one object for one run."""
