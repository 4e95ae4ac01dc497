"""Changes of lazy logits."""

from mutant import mutants_of

MUTANTS = [
    *mutants_of(
        "fastrlhf/lazy/source.py", "test_lazy_logits.py",
        (
            "lazy: logits of another weight",
            "if any(_version(x) != version for x, version in self._seen):", "if False:",
            "before_the_weight_changes",
        ),
        (
            "lazy: all logits at a time",
            "max(fewest, self.tokens // (_PARTS * held))", "self.tokens",
            "an_eighth",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/source.py", "test_lazy_wrappers.py",
        (
            "lazy: a dropout is drawn again",
            "self.own_is_there = not (holds_weight or drops)",
            "self.own_is_there = not holds_weight",
            "dropout",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/source.py", "test_lazy_logits.py",
        (
            "lazy: computed outside of autocast",
            "with torch.set_grad_enabled(differentiable and self.requires_grad), self.autocast():",
            "with torch.set_grad_enabled(differentiable and self.requires_grad):",
            "autocast_that",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/gradient.py", "test_lazy_chains_autograd.py",
        (
            "lazy: a graph is never let go",
            "                self.inner = None\n", "                pass\n",
            "kept or leak or twice or second",
        ),
        (
            "lazy: a gradient that is read lacks what is plain",
            "    total = gradient.rest\n", "    total = None\n",
            "hook or gradient",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/graph.py", "test_lazy_loops.py",
        (
            "lazy: a term reaches its head twice",
            "terms = [x._replace(heads=x.heads - parent.heads) for x in terms]", "pass",
            "KL or entropy or PPO",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/graph.py", "test_lazy_chains_autograd.py",
        (
            "lazy: a term goes by the first of two that are watched",
            "            gradient = dense(gradient)  # else it would all go by the first\n",
            "            pass\n",
            "different_ways",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/scores.py", "test_lazy_chains_modes.py",
        (
            "lazy: ignored tokens are remembered with zeros",
            "return -taken(scorer.stats(laid_out, ignore_index=IGNORED, lse=False).logprob)",
            "return -logprobs(of, targets)",
            "as_plain",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/scores.py", "test_lazy_logits.py",
        (
            "lazy: what was computed is not remembered",
            "    source.known.append(known)\n", "",
            "the_plan",
        ),
        (
            "lazy: the lse has the gradient of a log-prob",
            "self.with_gradient = self.stats.lse + (slope - slope.detach())",
            "self.with_gradient = self.stats.lse - (slope - slope.detach())",
            "gradients_of_what",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/views.py", "test_lazy_chains.py",
        (
            "lazy: an index of words is one of tokens",
            "parts[-1] != slice(None)", "False",
            "program",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/endings.py", "test_lazy_chains.py",
        (
            "lazy: an index smaller than the logits is of all tokens",
            "    if lead != x.shape[:-1]:\n", "    if False:\n",
            "program",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/endings.py", "test_lazy_logits.py",
        (
            "lazy: the factor of a sum is left out",
            "lambda: compute() * factor", "lambda: compute()",
            "factors",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/losses.py", "test_lazy_chains*.py",
        (
            "lazy: ignored labels are words",
            "    live = target != ignore_index\n", "    live = target == target\n",
            "program or ignored",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/recipe.py", "test_lazy_chains.py",
        (
            "lazy: what was written into logits is forgotten",
            "                    step.on_plain()\n", "                    pass\n",
            "program",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/building.py", "test_lazy_chains*.py",
        (
            "lazy: a write is not in the graph",
            "            Replaced.apply(lazy, lazy._plain)\n", "",
            "program or function or written",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/head.py", "test_lazy_logits.py",
        (
            "lazy: one position waits too",
            "hidden.shape[-2] < 2", "hidden.shape[-2] < 1",
            "one_position",
        ),
        (
            "lazy: a head is left enabled",
            "        _take_away(module)\n", "        pass\n",
            "on_and_off",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/report.py", "test_lazy_logits.py",
        (
            "lazy: a site is warned of at every call",
            "    if len(_built) > known:\n", "    if True:\n",
            "the_report",
        ),
        (
            "lazy: the tokens of a call are not counted",
            "    use.calls += 1\n    use.tokens += tokens\n\n", "    use.calls += 1\n\n",
            "the_report",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/meaning.py", "test_lazy_logits.py",
        (
            "lazy: a scale after a cap is one before it",
            "            return self._changed(factor=self.factor * by)\n", "            pass\n",
            "factors",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/meaning.py", "test_lazy_logits.py",
        (
            "lazy: a detached factor has a gradient",
            "            and self.constant == other.constant\n", "",
            "one_distribution",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/meaning.py", "test_lazy_logits.py",
        (
            "lazy: rows of one path are those of another",
            "return on_host and torch.equal(self.numbers, other.numbers)", "return True",
            "one_distribution",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/maps.py", "test_lazy_logits.py",
        (
            "lazy: a product of two distributions is an entropy",
            "if other.kind in kinds and p.same_as(other.first):", "if other.kind in kinds:",
            "looks_like",
        ),
    ),
    *mutants_of(
        "fastrlhf/lazy/maps.py", "test_lazy_logits.py",
        (
            "lazy: logits times a negative number keep their order",
            "words.kind is Kind.LOGITS and not factor > 0", "False",
            "looks_like",
        ),
    ),
]  # fmt: skip
