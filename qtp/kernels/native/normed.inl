// An RMSNorm's last steps, for the bodies of each_isa.inl and int8.inl: elements i ... of x, of which n are left, times `scale`,
// rounded, times the weight; with a bias the sum is rounded once. What lies behind the n is 0.
template <class E>
QTP_INLINE F normed(const typename E::stored* x, F scale, const typename E::stored* weight, const typename E::stored* bias, size_t i,
                    size_t n) {
  const F y = rounded<E>(load_up_to<E>(x + i, n) * scale), w = load_up_to<E>(weight + i, n);
  return rounded<E>(bias == nullptr ? y * w : fma(y, w, load_up_to<E>(bias + i, n)));
}
