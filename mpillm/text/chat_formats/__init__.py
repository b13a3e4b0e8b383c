"""Chat formats: reasoning, content and tool calls of a model's answers, split and held to grammars."""
