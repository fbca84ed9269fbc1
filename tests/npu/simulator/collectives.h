// "hccl" for tests: gloo on the same bytes, with HCCL's limits on types and reductions.
#pragma once
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "memory.h"

namespace simulator {

using Tensors = std::vector<at::Tensor>;
using WorkPointer = c10::intrusive_ptr<c10d::Work>;

inline Tensors onHost(const Tensors& tensors) {
  Tensors result;
  for (const auto& tensor : tensors) {
    TORCH_CHECK(tensor.device().is_privateuseone(), "hccl takes npu tensors, found one on ", tensor.device());
    result.push_back(onHost(tensor));
  }
  return result;
}

// gloo's work, which answers with the npu tensors that the caller gave.
class HcclWork final : public c10d::Work {
 public:
  HcclWork(WorkPointer inner, Tensors tensors) : inner_(std::move(inner)), tensors_(std::move(tensors)) {
    future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    inner_->getFuture()->addCallback([future = future_, result = tensors_](c10::ivalue::Future& done) {
      if (done.hasError()) {
        future->setError(done.exception_ptr());
      } else {
        future->markCompleted(c10::IValue(result));
      }
    });
  }
  bool isCompleted() override { return inner_->isCompleted(); }
  bool isSuccess() const override { return inner_->isSuccess(); }
  bool wait(std::chrono::milliseconds timeout) override { return inner_->wait(timeout); }
  void synchronize() override { inner_->synchronize(); }
  Tensors result() override { return tensors_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

 private:
  WorkPointer inner_;
  Tensors tensors_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

// The collectives that training uses; the others raise, as c10d::Backend has it.
class Hccl final : public c10d::Backend {
 public:
  explicit Hccl(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "hccl"; }

  WorkPointer broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto host = onHost(tensors);
    return answer(gloo_->broadcast(host, options), tensors);
  }
  WorkPointer allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    for (const auto& tensor : tensors) checkReduction(tensor, options.reduceOp);
    auto host = onHost(tensors);
    return answer(gloo_->allreduce(host, options), tensors);
  }
  WorkPointer allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                        const c10d::AllgatherOptions& options) override {
    std::vector<Tensors> host_outputs;
    Tensors all;
    for (const auto& output : outputs) {
      host_outputs.push_back(onHost(output));
      all.insert(all.end(), output.begin(), output.end());
    }
    auto host_inputs = onHost(inputs);
    return answer(gloo_->allgather(host_outputs, host_inputs, options), all);
  }
  WorkPointer _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto host = onHost(Tensors{output, input});
    // As for HCCL the number of elements counts, not the shape.
    auto flat_output = host[0].view(-1);
    auto flat_input = host[1].view(-1);
    return answer(gloo_->_allgather_base(flat_output, flat_input, options), {output});
  }
  WorkPointer barrier(const c10d::BarrierOptions& options) override { return gloo_->barrier(options); }

 private:
  static WorkPointer answer(WorkPointer inner, Tensors tensors) {
    return c10::make_intrusive<HcclWork>(std::move(inner), std::move(tensors));
  }

  // The types are those that torch_npu's ProcessGroupHCCL lets through, the reductions those of HcclReduceOp.
  static void checkReduction(const at::Tensor& tensor, const c10d::ReduceOp& reduction) {
    const auto type = tensor.scalar_type();
    TORCH_CHECK(type == at::kChar || type == at::kShort || type == at::kInt || type == at::kLong || type == at::kHalf ||
                    type == at::kFloat || type == at::kBFloat16,
                "HCCL AllReduce: Unsupported data type ", type);
    const auto kind = static_cast<c10d::ReduceOp::RedOpType>(reduction.op_);
    TORCH_CHECK(kind == c10d::ReduceOp::SUM || kind == c10d::ReduceOp::PRODUCT || kind == c10d::ReduceOp::MIN ||
                    kind == c10d::ReduceOp::MAX,
                "HCCL AllReduce: Unsupported reduction; there are sum, product, min and max");
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
};

}  // namespace simulator
