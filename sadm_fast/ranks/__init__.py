"""The processes of a job: how they start, meet, vote, stop, and notice that one is gone."""
