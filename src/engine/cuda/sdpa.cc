#include "engine/cuda/sdpa.h"

#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <cmath>
#include <map>
#include <tuple>
#include <unordered_map>

#include "base/check.h"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // cudnn-frontend looks its functions up here
}

namespace uly::engine::cuda {
namespace {

namespace fe = cudnn_frontend;
using Tensor = fe::graph::Tensor_attributes;
using Graph = fe::graph::Graph;

enum Uid : int64_t { kQ = 1, kK, kV, kO, kLse, kDo, kDq, kDk, kDv, kQLengths, kKvLengths, kQOffsets, kKvOffsets, kOOffsets, kLseOffsets };

auto tied(const SdpaShape& s) {
  return std::tie(s.slots, s.queries, s.keys, s.n, s.k, s.H, s.q_stride, s.kv_stride, s.o_stride, s.lse_stride, s.dkv_stride, s.dq_stride, s.mask, s.ragged, s.deterministic);
}

std::string words(const SdpaShape& s, const char* which) {
  return fmt::format("attention {} of {} x {} queries and {} keys, heads {}:{} of {}{}{}", which, s.slots, s.queries, s.keys, s.n, s.k, s.H, s.mask == Mask::kCausal ? ", causal" : "",
                     s.ragged ? ", ragged" : "");
}

void good(fe::error_t e, const SdpaShape& s, const char* which) {
  if (e.is_bad()) throw InternalError(fmt::format("cuDNN: {}: {}", words(s, which), e.get_message()));
}

// The tensors of one graph.
class Tensors {
 public:
  Tensors(Graph& graph, const SdpaShape& shape) : g_(graph), s_(shape) {
    if (!s_.ragged) return;
    q_offsets_ = vector("q_offsets", kQOffsets, s_.slots + 1, fe::DataType_t::INT64);
    kv_offsets_ = vector("kv_offsets", kKvOffsets, s_.slots + 1, fe::DataType_t::INT64);
    o_offsets_ = vector("o_offsets", kOOffsets, s_.slots + 1, fe::DataType_t::INT64);
    lse_offsets_ = vector("lse_offsets", kLseOffsets, s_.slots + 1, fe::DataType_t::INT64);
    q_lengths = vector("q_lengths", kQLengths, s_.slots, fe::DataType_t::INT32);
    kv_lengths = vector("kv_lengths", kKvLengths, s_.slots, fe::DataType_t::INT32);
  }

  std::shared_ptr<Tensor> queries(const char* name, Uid uid, int64_t stride) { return g_.tensor(Tensor().set_name(name).set_uid(uid).set_dim(dims(s_.n, s_.queries)).set_stride(strides(stride, s_.queries)).set_ragged_offset(q_offsets_)); }
  std::shared_ptr<Tensor> keys(const char* name, Uid uid) { return g_.tensor(Tensor().set_name(name).set_uid(uid).set_dim(dims(s_.k, s_.keys)).set_stride(strides(s_.kv_stride, s_.keys)).set_ragged_offset(kv_offsets_)); }
  std::shared_ptr<Tensor> output(const char* name, Uid uid) { return g_.tensor(Tensor().set_name(name).set_uid(uid).set_dim(dims(s_.n, s_.queries)).set_stride(strides(s_.o_stride, s_.queries)).set_ragged_offset(o_offsets_)); }
  std::shared_ptr<Tensor> lse() { return g_.tensor(as_lse(Tensor().set_name("lse").set_uid(kLse))); }

  void output_as_o(Tensor& t) const { t.set_output(true).set_uid(kO).set_dim(dims(s_.n, s_.queries)).set_stride(strides(s_.o_stride, s_.queries)).set_ragged_offset(o_offsets_); }
  void output_as_lse(Tensor& t) const { as_lse(t.set_output(true).set_uid(kLse)); }
  void output_as_dq(Tensor& t) const { t.set_output(true).set_uid(kDq).set_dim(dims(s_.n, s_.queries)).set_stride(strides(s_.dq_stride ? s_.dq_stride : s_.q_stride, s_.queries)).set_ragged_offset(q_offsets_); }
  void output_as_dkv(Tensor& t, Uid uid) const {
    t.set_output(true).set_uid(uid).set_dim(dims(s_.k, s_.keys)).set_stride(strides(s_.dkv_stride ? s_.dkv_stride : s_.kv_stride, s_.keys)).set_ragged_offset(kv_offsets_);
  }

  // Attributes that forward and backward share.
  template <typename Attributes>
  Attributes attributes(const char* name) const {
    Attributes a;
    a.set_name(name).set_attn_scale(static_cast<float>(1.0 / std::sqrt(static_cast<double>(s_.H))));
    if (s_.mask == Mask::kCausal) a.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
    if (s_.ragged) a.set_padding_mask(true).set_seq_len_q(q_lengths).set_seq_len_kv(kv_lengths);
    return a;
  }

  std::shared_ptr<Tensor> q_lengths, kv_lengths;

 private:
  std::vector<int64_t> dims(int64_t heads, int64_t tokens) const { return {s_.slots, heads, tokens, s_.H}; }
  std::vector<int64_t> strides(int64_t stride, int64_t tokens) const { return {tokens * stride, s_.H, stride, 1}; }
  Tensor& as_lse(Tensor& t) const {
    t.set_data_type(fe::DataType_t::FLOAT).set_dim({s_.slots, s_.n, s_.queries, 1});
    if (!s_.ragged) return t.set_stride({s_.n * s_.queries, s_.queries, 1, 1});
    return t.set_stride({s_.queries * s_.lse_stride, 1, s_.lse_stride, 1}).set_ragged_offset(lse_offsets_);
  }
  std::shared_ptr<Tensor> vector(const char* name, Uid uid, int64_t count, fe::DataType_t type) { return g_.tensor(Tensor().set_name(name).set_uid(uid).set_dim({count, 1, 1, 1}).set_stride({1, 1, 1, 1}).set_data_type(type)); }

  Graph& g_;
  const SdpaShape& s_;
  std::shared_ptr<Tensor> q_offsets_, kv_offsets_, o_offsets_, lse_offsets_;
};

std::shared_ptr<Graph> empty_graph() {
  auto g = std::make_shared<Graph>();
  g->set_io_data_type(fe::DataType_t::BFLOAT16).set_intermediate_data_type(fe::DataType_t::FLOAT).set_compute_data_type(fe::DataType_t::FLOAT);
  return g;
}

struct Built {
  std::shared_ptr<Graph> graph;
  int64_t workspace = 0;
};

Built finished(std::shared_ptr<Graph> g, cudnnHandle_t handle, const SdpaShape& s, const char* which) {
  good(g->build(handle, {fe::HeurMode_t::A}), s, which);  // its first plan; the others were slower by half and more
  Built b{std::move(g), 0};
  good(b.graph->get_workspace_size(b.workspace), s, which);
  return b;
}

Built build_forward(cudnnHandle_t handle, const SdpaShape& s) {
  auto g = empty_graph();
  Tensors t(*g, s);
  auto [o, lse] = g->sdpa(t.queries("q", kQ, s.q_stride), t.keys("k", kK), t.keys("v", kV), t.attributes<fe::graph::SDPA_attributes>("forward").set_generate_stats(true));
  t.output_as_o(*o);
  t.output_as_lse(*lse);
  return finished(std::move(g), handle, s, "forward");
}

Built build_backward(cudnnHandle_t handle, const SdpaShape& s) {
  auto g = empty_graph();
  Tensors t(*g, s);
  auto options = t.attributes<fe::graph::SDPA_backward_attributes>("backward").set_deterministic_algorithm(s.deterministic);
  auto [dq, dk, dv] = g->sdpa_backward(t.queries("q", kQ, s.q_stride), t.keys("k", kK), t.keys("v", kV), t.output("o", kO), t.output("do", kDo), t.lse(), options);
  t.output_as_dq(*dq);
  t.output_as_dkv(*dk, kDk);
  t.output_as_dkv(*dv, kDv);
  return finished(std::move(g), handle, s, "backward");
}

using Pack = std::unordered_map<int64_t, void*>;

Pack pack_of(const SdpaShape& s, const SdpaPointers& p) {
  const auto raw = [](const void* x) { return const_cast<void*>(x); };
  Pack pack{{kQ, raw(p.q)}, {kK, raw(p.k)}, {kV, raw(p.v)}, {kO, p.o}, {kLse, p.lse}};
  if (s.ragged)
    pack.insert({{kQLengths, raw(p.q_lengths)}, {kKvLengths, raw(p.kv_lengths)}, {kQOffsets, raw(p.q_offsets)}, {kKvOffsets, raw(p.kv_offsets)}, {kOOffsets, raw(p.o_offsets)}, {kLseOffsets, raw(p.lse_offsets)}});
  return pack;
}

}  // namespace

bool SdpaShape::operator<(const SdpaShape& o) const { return tied(*this) < tied(o); }

struct Sdpa::Inside {
  cudnnHandle_t handle = nullptr;
  cudaStream_t stream = nullptr;
  std::map<SdpaShape, Built> forwards, backwards;

  // Plans of a run are few; of one whose lengths never come again all are dropped now and then.
  static constexpr size_t kMostPlans = 256;

  const Built& built(std::map<SdpaShape, Built>& plans, const SdpaShape& s, Built (*build)(cudnnHandle_t, const SdpaShape&)) {
    const auto found = plans.find(s);
    if (found != plans.end()) return found->second;
    if (plans.size() >= kMostPlans) {
      cudaStreamSynchronize(stream);  // none of them is running
      plans.clear();
    }
    return plans.emplace(s, build(handle, s)).first->second;
  }
  const Built& forward(const SdpaShape& s) { return built(forwards, s, &build_forward); }
  const Built& backward(const SdpaShape& s) { return built(backwards, s, &build_backward); }
  // A GPU that has failed earlier fails here: that is said, not what cuDNN makes of it.
  void run(const Built& b, Pack pack, void* workspace, int64_t bytes, const SdpaShape& s, const char* which) {
    if (b.workspace > bytes) throw InternalError(fmt::format("{}: cuDNN needs {} bytes of workspace, the plan gave {}", words(s, which), b.workspace, bytes));
    const fe::error_t e = b.graph->execute(handle, pack, workspace);
    if (!e.is_bad()) return;
    const cudaError_t status = cudaStreamQuery(stream);
    if (status != cudaSuccess && status != cudaErrorNotReady) throw DeviceError(fmt::format("CUDA: {}: {}", words(s, which), cudaGetErrorString(status)));
    good(e, s, which);
  }
};

Sdpa::Sdpa(void* stream) : inside_(std::make_unique<Inside>()) {
  if (cudnn_frontend::cudnn_dlhandle == nullptr) cudnn_frontend::cudnn_dlhandle = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_GLOBAL);
  if (cudnn_frontend::cudnn_dlhandle == nullptr) throw DeviceError(fmt::format("cuDNN (libcudnn.so.9) cannot be loaded: {}", dlerror()));
  const auto status = fe::detail::create_handle(&inside_->handle);
  if (status != CUDNN_STATUS_SUCCESS) throw DeviceError(fmt::format("cuDNN cannot be used: {}", fe::detail::get_error_string(status)));
  inside_->stream = static_cast<cudaStream_t>(stream);
  fe::detail::set_stream(inside_->handle, inside_->stream);
}

Sdpa::~Sdpa() {
  if (inside_->handle) fe::detail::destroy_handle(inside_->handle);
}

int64_t Sdpa::forward_workspace(const SdpaShape& s) { return inside_->forward(s).workspace; }
int64_t Sdpa::backward_workspace(const SdpaShape& s) { return inside_->backward(s).workspace; }

void Sdpa::forward(const SdpaShape& s, const SdpaPointers& p, void* workspace, int64_t bytes) { inside_->run(inside_->forward(s), pack_of(s, p), workspace, bytes, s, "forward"); }

void Sdpa::backward(const SdpaShape& s, const SdpaPointers& p, void* workspace, int64_t bytes) {
  Pack pack = pack_of(s, p);
  pack.insert({{kDo, const_cast<void*>(p.d_o)}, {kDq, p.dq}, {kDk, p.dk}, {kDv, p.dv}});
  inside_->run(inside_->backward(s), std::move(pack), workspace, bytes, s, "backward");
}

}  // namespace uly::engine::cuda
