"""Distillation: objectives, stored soft labels, and the stages that make teacher and student."""
