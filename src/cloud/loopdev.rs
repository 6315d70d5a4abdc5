//! The embedded provider: sparse files as volumes, loop devices as attachments.
