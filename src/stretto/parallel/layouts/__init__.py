"""What each library and each family of models lets tokens mix through, as declarations."""
