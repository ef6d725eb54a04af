"""Recall and false alarms of the search for text that is burned into pixels."""
