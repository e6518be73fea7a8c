"""What a policy acts in: `protocol` says what one is; `wordle`, `math` and `code` are here, `catalog` names them."""
