package escaper

// For tests of what has no other way in.
var (
	ParsePorts = parsePorts
	Classify   = (*Path).classify
)
