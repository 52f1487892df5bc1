"""A verdict as people and machines read it: Markdown, JUnit, GitHub, words. Judges nothing."""
