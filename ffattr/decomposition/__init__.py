"""The mathematics: one layer as tensors, the vectors that it adds up, and their norms. No module of a model, no kernel.

In come a layer's parameters (`LayerWeights`), its input, and what its attention did; out come its streams, decomposed
at every point of the layer: one vector for each input token, and a bias. float64 in, float64 out.

Read
    scopes.py, affine.py, attention.py, routing.py   the points of a layer; projections and norms; recorded attention;
                                                     which experts a token goes to
    activations.py, closed_forms.py                  activation functions, and their path integrals
    integrated_gradients.py, clamp.py                the factor of each neuron; the same where gate and up are cut off
    layer.py                                         one layer's parameters, and what a user's hooks make of them
    walk.py                                          the one walk through a layer
    reference.py                                     the definition: one function for each formula
    precision.py, sketch.py                          dtypes and tolerances; narrower products and their error

The formulas. Row vectors: ``y = x W + b``; ``i`` is a query (output) token, ``j`` a key (input) token.

Freeze a layer at one forward pass: attention weights ``alpha``, statistics of norms, activations. Its output at token
``i`` is then a sum of one vector for each input token, and a bias vector:

    layer(x)_i = sum_j F_i(x_j) + bias_i                     M[i, j] = ||F_i(x_j)||    the map of a scope

**Attention** (2020). ``f_h(x_j) = (in_j W_V^h + b_V^h) W_O^h`` with ``in_j = x_j``, or its norm in pre-LN layers; the
vector is ``sum_h alpha[h, i, j] f_h(x_j)``, and ``b_O`` is bias. ``value_bias="token"`` leaves ``b_V`` and the shift of
a pre-norm with their token, ``"separate"`` sends them to the bias. Query head ``h`` reads key/value head
``h // (H / Hkv)``. Rows of ``alpha`` may sum to less than one (sinks). Latent attention has ``in_j`` pass a projection
and a norm first, which is linear once its statistics are frozen.
**Residual** (2021). Adds ``x_i`` to the vector of ``j == i``.
**Norm** (2021). With the statistics of the whole input: ``(p - mean(p)) / s_i * gamma``, or ``p / rms_i * gamma``; the
shift goes to the bias.
**Feed-forward block** (2024). ``z_i = sum_j z_ij + zb_i`` with ``z_ij = t_ij W1`` and ``zb_i = tb_i W1 + b1``.
Integrated Gradients of ``g`` along the straight path from the baseline ``b`` (zero unless said otherwise) give input
``j`` the amount

    z_ij S_i,     S_i = integral_0^1 g'(b + a (z_i - b)) da = (g(z_i) - g(b)) / (z_i - b),     g'(b) where z_i = b

one factor for each token and neuron; a Riemann rule or Gauss-Legendre only changes how ``S`` is computed. The
contribution is ``(z_ij S_i) W2``, the bias ``((zb_i - b) S_i + g(b)) W2 + b2``. A gated block ``phi(u) v`` has two
factors, along the same path from zero: ``C_v = integral_0^1 phi(a u) da`` and ``C_u = v integral_0^1 a phi'(a u) da``;
``j`` gets ``(u_ij C_u + v_ij C_v) W_down``. A mixture adds up its experts with their weights, the routing held fixed
(or lets the weights multiply what they read); branches add up as they are, or times a number of the token's own.

What costs no ``[T, T, d]`` tensor. Let the residual be one more head with weight ``delta_ij`` and feature ``x_j``.
*Attention-level* norms are quadratic forms: ``||sum_h a_h V_jh||^2 = a^T (V_j V_j^T) a``. Behind the feed-forward
block, *direct* computes ``((alpha[:, j, :] Q_j) S_i) W2`` for blocks of pairs, where ``Q_j = V_j W1``: ``2 T^2 F d``
operations. *operator* makes one matrix ``J_i = W1' diag(S_i) W2'`` for each query: ``T (2 F d^2) + 2 T^2 d^2``, or
``H dh / d`` times as much where heads are wider than the model, unless they are *mixed* first. With
``F = 4d`` it is less from about ``T = 4d / 3`` on. *pairs* takes single pairs. A *sketch* narrows ``W2`` to a few
directions. Groups of keys are summed before the product. Causal layers have half the pairs.

Sources: Kobayashi et al. 2020 (arXiv 2004.10102), 2021 (2109.07152), 2024 (2302.00456); Integrated Gradients:
Sundararajan et al. 2017 (1703.01365). What of the 2024 paper could not be read is this project's own definition.
"""
