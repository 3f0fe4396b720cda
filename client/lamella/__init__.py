"""Lamella."""
