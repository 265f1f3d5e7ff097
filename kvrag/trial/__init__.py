"""Trials of a model on sample prompts: what codecs lose, and which one to take."""
