// Copyright the retinaray authors. Licensed under the Apache License, Version 2.0; see LICENSE.
//
// Output parser of a retinaray detector for DeepStream's nvinfer (6.2 to 9.2).
//
// The engine gives, per frame, D candidates by falling score: `boxes` [D, 4] as left, top, right,
// bottom in network pixels, `scores` [D] and `labels` [D] (int32). This function hands them on;
// nvinfer suppresses overlaps afterwards (cluster-mode=2).
//
// Compile it on the device, against the headers of the DeepStream that runs there (`make`):
// NvDsInferObjectDetectionInfo has 24 bytes up to DeepStream 6.3 and 28 from 9.0 on, and a library
// built for the one corrupts the memory of the other.

#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <vector>

#include "nvdsinfer_custom_impl.h"

extern "C" bool NvDsInferParseRetinaNet(std::vector<NvDsInferLayerInfo> const& outputLayersInfo,
                                        NvDsInferNetworkInfo const& networkInfo,
                                        NvDsInferParseDetectionParams const& detectionParams,
                                        std::vector<NvDsInferObjectDetectionInfo>& objectList);

static_assert(std::is_same<decltype(&NvDsInferParseRetinaNet), NvDsInferParseCustomFunc>::value,
              "this DeepStream declares parsers with another prototype");

namespace {

// TensorRT's TopK gives fewer than 3840: a larger count is not from an engine of ours.
constexpr unsigned int kMaxCandidates = 3840;

enum Fault : std::size_t {
    kMissingLayer,
    kNullBuffer,
    kWrongType,
    kWrongShape,
    kTooFewThresholds,
    kNoClasses,
    kNoNetworkSize,
    kUnknownLabel,
    kNumFaults
};

// nvinfer calls this once a frame, from several threads: each fault is told once, not 30 times a
// second.
void complain(Fault fault, const char* subject, const char* text) {
    static std::array<std::atomic<bool>, kNumFaults> told{};
    if (!told[fault].exchange(true)) {
        std::fprintf(stderr, "NvDsInferParseRetinaNet: %s: %s\n", subject, text);
    }
}

const NvDsInferLayerInfo* find_layer(std::vector<NvDsInferLayerInfo> const& layers,
                                     const char* name) {
    for (auto const& layer : layers) {
        if (layer.layerName != nullptr && std::strcmp(layer.layerName, name) == 0) {
            if (layer.buffer == nullptr) {
                complain(kNullBuffer, name, "the output has no buffer");
                return nullptr;
            }
            return &layer;
        }
    }
    complain(kMissingLayer, name,
             "the engine has no output of this name; build it from the ONNX file of this bundle");
    return nullptr;
}

// Memory of the outputs is read bytewise, so that its alignment does not matter.
template <typename Number>
Number load(const void* buffer, std::size_t index) {
    Number value;
    std::memcpy(&value, static_cast<const char*>(buffer) + index * sizeof(Number), sizeof(Number));
    return value;
}

float widen_half(std::uint16_t bits) {
    const int exponent = (bits >> 10) & 0x1f;
    const int mantissa = bits & 0x3ff;
    float magnitude = 0.0F;
    if (exponent == 0x1f) {
        magnitude = mantissa == 0 ? INFINITY : NAN;
    } else if (exponent == 0) {
        magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    } else {
        magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    }
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// An output of floats, FP32 or FP16.
class Floats {
public:
    explicit Floats(NvDsInferLayerInfo const& layer)
        : buffer_(layer.buffer), is_half_(layer.dataType == HALF) {}

    float operator[](std::size_t index) const {
        return is_half_ ? widen_half(load<std::uint16_t>(buffer_, index))
                        : load<float>(buffer_, index);
    }

private:
    const void* buffer_;
    bool is_half_;
};

bool check_types(NvDsInferLayerInfo const& boxes, NvDsInferLayerInfo const& scores,
                 NvDsInferLayerInfo const& labels) {
    for (auto const* layer : {&boxes, &scores}) {
        if (layer->dataType != FLOAT && layer->dataType != HALF) {
            complain(kWrongType, layer->layerName, "expected FP32 or FP16 values");
            return false;
        }
    }
    if (labels.dataType != INT32) {
        complain(kWrongType, labels.layerName, "expected INT32 values");
        return false;
    }
    return true;
}

// Number of candidates, or 0 when the shapes do not agree.
std::size_t count_candidates(NvDsInferLayerInfo const& boxes, NvDsInferLayerInfo const& scores,
                             NvDsInferLayerInfo const& labels) {
    const bool has_ranks = boxes.inferDims.numDims == 2 && scores.inferDims.numDims == 1 &&
                           labels.inferDims.numDims == 1;
    const unsigned int count = has_ranks ? scores.inferDims.d[0] : 0;
    if (count == 0 || count > kMaxCandidates || labels.inferDims.d[0] != count ||
        boxes.inferDims.d[0] != count || boxes.inferDims.d[1] != 4) {
        complain(kWrongShape, "boxes, scores, labels",
                 "expected [D, 4], [D] and [D] without the batch, D from 1 to 3840; build the "
                 "engine from the ONNX file of this bundle");
        return 0;
    }
    return count;
}

bool check_params(NvDsInferNetworkInfo const& network,
                  NvDsInferParseDetectionParams const& params) {
    if (network.width == 0 || network.height == 0) {
        complain(kNoNetworkSize, "infer-dims", "the network has no width or no height");
        return false;
    }
    if (params.numClassesConfigured == 0) {
        complain(kNoClasses, "num-detected-classes", "expected the number of classes");
        return false;
    }
    if (params.perClassPreclusterThreshold.size() < params.numClassesConfigured) {
        complain(kTooFewThresholds, "pre-cluster-threshold", "expected one for each class");
        return false;
    }
    return true;
}

// Back in the frame, nvinfer adds top and height again, and drops what its rounding puts below the
// frame (unless told to crop): boxes end this much above the lower edge.
constexpr float kEdgeMargin = 1.0F / 1024.0F;

// `value` cut to [0, limit]; the caller has refused what is not finite.
float clip(float value, float limit) {
    return value < 0.0F ? 0.0F : (value > limit ? limit : value);
}

}  // namespace

extern "C" bool NvDsInferParseRetinaNet(std::vector<NvDsInferLayerInfo> const& outputLayersInfo,
                                        NvDsInferNetworkInfo const& networkInfo,
                                        NvDsInferParseDetectionParams const& detectionParams,
                                        std::vector<NvDsInferObjectDetectionInfo>& objectList) {
    const NvDsInferLayerInfo* boxes_layer = find_layer(outputLayersInfo, "boxes");
    const NvDsInferLayerInfo* scores_layer = find_layer(outputLayersInfo, "scores");
    const NvDsInferLayerInfo* labels_layer = find_layer(outputLayersInfo, "labels");
    if (boxes_layer == nullptr || scores_layer == nullptr || labels_layer == nullptr ||
        !check_types(*boxes_layer, *scores_layer, *labels_layer) ||
        !check_params(networkInfo, detectionParams)) {
        return false;
    }
    const std::size_t count = count_candidates(*boxes_layer, *scores_layer, *labels_layer);
    if (count == 0) {
        return false;
    }
    const Floats boxes(*boxes_layer);
    const Floats scores(*scores_layer);
    const auto width = static_cast<float>(networkInfo.width);
    const float height = static_cast<float>(networkInfo.height) - kEdgeMargin;
    for (std::size_t row = 0; row < count; ++row) {
        const auto label = load<std::int32_t>(labels_layer->buffer, row);
        if (label < 0 || static_cast<unsigned int>(label) >= detectionParams.numClassesConfigured) {
            complain(kUnknownLabel, "labels", "a class beyond num-detected-classes is left out");
            continue;
        }
        const auto class_id = static_cast<unsigned int>(label);
        const float score = scores[row];
        // Strictly above, as everywhere else in retinaray; so written, it drops NaN too.
        if (!(score > detectionParams.perClassPreclusterThreshold[class_id]) ||
            !std::isfinite(score)) {
            continue;
        }
        const std::array<float, 4> corners{boxes[4 * row], boxes[4 * row + 1], boxes[4 * row + 2],
                                           boxes[4 * row + 3]};
        if (!std::isfinite(corners[0]) || !std::isfinite(corners[1]) ||
            !std::isfinite(corners[2]) || !std::isfinite(corners[3])) {
            continue;
        }
        const float left = clip(corners[0], width);
        const float top = clip(corners[1], height);
        const float right = clip(corners[2], width);
        const float bottom = clip(corners[3], height);
        if (!(right > left) || !(bottom > top)) {
            continue;
        }
        // Value-initialised: later DeepStreams have fields more, such as rotation_angle.
        NvDsInferObjectDetectionInfo object{};
        object.classId = class_id;
        object.left = left;
        object.top = top;
        object.width = right - left;
        object.height = bottom - top;
        object.detectionConfidence = score;
        objectList.push_back(object);
    }
    return true;
}
