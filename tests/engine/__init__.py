"""Tests of the engine part."""
