"""What a chat's memory has lost and gets back: spans of the chat as entries of the store, found by Chroma."""
