"""What a run did: before and after, stage by stage."""
