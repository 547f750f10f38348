"""The tests of rowgrad; the directories mirror `src/rowgrad`."""
