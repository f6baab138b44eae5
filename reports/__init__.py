"""Artifacts in; HTML, JUnit, Markdown and verdicts out."""
