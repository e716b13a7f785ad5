"""All that a person looks at: the panel, its controls and its charts."""
