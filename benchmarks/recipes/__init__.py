"""Recipes: BERT-base pruned on SQuAD, MNLI and QQP, as in Sanh et al. 2020, in one command each."""
