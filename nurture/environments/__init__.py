"""What a policy acts in: `protocol` says what an environment is, `wordle` is one, with two players to compare with."""
