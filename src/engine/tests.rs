//! The engine against scripted fakes of its traits.
