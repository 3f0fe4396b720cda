"""Tests of the client part."""
