"""Run, edit with, teach and measure three-stage cascade models."""
