package resolve

// What the forwarder reads, for fuzzing.
var (
	QuestionOf = questionOf
	Answers    = answers
)
