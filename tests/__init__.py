"""Tests; what several of them share lies beside this file."""
