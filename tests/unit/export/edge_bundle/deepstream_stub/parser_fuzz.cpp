// Throws random layers at the parser; built with the address and undefined-behaviour sanitizers,
// which end the program at the first wrong read.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>

#include "nvdsinfer_custom_impl.h"

extern "C" bool NvDsInferParseRetinaNet(std::vector<NvDsInferLayerInfo> const&,
                                        NvDsInferNetworkInfo const&,
                                        NvDsInferParseDetectionParams const&,
                                        std::vector<NvDsInferObjectDetectionInfo>&);

namespace {

std::mt19937 generator(7);

std::uint32_t draw(std::uint32_t limit) { return static_cast<std::uint32_t>(generator() % limit); }

const std::uint32_t kCounts[] = {0, 1, 2, 4, 5, 3840, 3841, 1u << 20, 1u << 31, 0xffffffffu};

// The memory that a layer's shape asks for, or a few bytes where it asks for more than any engine
// gives: a parser that believed such a shape would read beyond them.
std::unique_ptr<char[]> make_buffer(NvDsInferLayerInfo& layer) {
    double elements = 1;
    for (std::uint32_t axis = 0; axis < layer.inferDims.numDims && axis < 8; ++axis) {
        elements *= layer.inferDims.d[axis];
    }
    const std::size_t width = layer.dataType == HALF ? 2 : layer.dataType == INT8 ? 1 : 4;
    const auto bytes = elements <= 4 * 3840 ? static_cast<std::size_t>(elements) * width : 4;
    // One byte more and a start beside the boundary: alignment must not matter either.
    std::unique_ptr<char[]> memory(new char[bytes + 1]);
    char* start = memory.get() + 1;
    for (std::size_t index = 0; index < bytes; ++index) {
        start[index] = static_cast<char>(draw(256));
    }
    if (layer.dataType == FLOAT && bytes >= 4 && bytes % 4 == 0) {
        for (std::size_t index = 0; index + 4 <= bytes; index += 4) {
            float value = static_cast<float>(draw(2000)) / 1000.0F * (draw(2) ? 1.0F : 300.0F);
            const std::uint32_t kind = draw(20);
            if (kind == 0) value = std::numeric_limits<float>::quiet_NaN();
            if (kind == 1) value = std::numeric_limits<float>::infinity();
            if (kind == 2) value = -value;
            std::memcpy(start + index, &value, 4);
        }
    }
    if (layer.dataType == INT32 && bytes >= 4) {
        for (std::size_t index = 0; index + 4 <= bytes; index += 4) {
            const std::int32_t label = draw(10) == 0 ? -5 : static_cast<std::int32_t>(draw(6));
            std::memcpy(start + index, &label, 4);
        }
    }
    layer.buffer = start;
    return memory;
}

NvDsInferLayerInfo draw_layer(const char* name, NvDsInferDataType type, std::uint32_t count,
                              bool is_boxes) {
    NvDsInferLayerInfo layer{};
    layer.layerName = draw(40) == 0 ? (draw(2) ? nullptr : "other") : name;
    layer.dataType = draw(20) == 0 ? static_cast<NvDsInferDataType>(draw(7)) : type;
    if (type == FLOAT && draw(4) == 0) layer.dataType = HALF;
    layer.inferDims.numDims = is_boxes ? 2 : 1;
    layer.inferDims.d[0] = draw(25) == 0 ? kCounts[draw(10)] : count;
    layer.inferDims.d[1] = draw(25) == 0 ? kCounts[draw(10)] : 4;
    if (draw(30) == 0) layer.inferDims.numDims = draw(12);
    return layer;
}

bool is_sound(NvDsInferObjectDetectionInfo const& object, NvDsInferNetworkInfo const& network,
              NvDsInferParseDetectionParams const& params) {
    return object.classId < params.numClassesConfigured && std::isfinite(object.left) &&
           std::isfinite(object.top) && object.left >= 0 && object.top >= 0 && object.width > 0 &&
           object.height > 0 &&
           object.left + object.width <= static_cast<float>(network.width) * 1.0001F &&
           object.top + object.height <= static_cast<float>(network.height) * 1.0001F &&
           std::isfinite(object.detectionConfidence) &&
           object.detectionConfidence > params.perClassPreclusterThreshold[object.classId];
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 1000;
    int accepted = 0, refused = 0;
    std::size_t objects_in_all = 0;
    for (int round = 0; round < rounds; ++round) {
        const std::uint32_t count = draw(6) == 0 ? kCounts[draw(10)] : 1 + draw(40);
        std::vector<NvDsInferLayerInfo> layers = {draw_layer("boxes", FLOAT, count, true),
                                                  draw_layer("scores", FLOAT, count, false),
                                                  draw_layer("labels", INT32, count, false)};
        std::vector<std::unique_ptr<char[]>> memories;
        for (auto& layer : layers) {
            memories.push_back(make_buffer(layer));
            if (draw(40) == 0) layer.buffer = nullptr;
        }
        if (draw(20) == 0) layers.erase(layers.begin() + draw(3));
        NvDsInferNetworkInfo network{draw(50) == 0 ? 0 : 1 + draw(640),
                                     draw(50) == 0 ? 0 : 1 + draw(640), 3};
        NvDsInferParseDetectionParams params{};
        params.numClassesConfigured = draw(50) == 0 ? 0xffffffffu : draw(6);
        params.perClassPreclusterThreshold.assign(draw(20) == 0 ? draw(4) : 6, 0.3F);
        std::vector<NvDsInferObjectDetectionInfo> objects;
        if (!NvDsInferParseRetinaNet(layers, network, params, objects)) {
            ++refused;
            if (!objects.empty()) return std::puts("refused, but left objects"), 1;
            continue;
        }
        ++accepted;
        objects_in_all += objects.size();
        for (auto const& object : objects) {
            if (!is_sound(object, network, params)) return std::puts("unsound object"), 1;
        }
    }
    std::printf("%d accepted, %d refused, %zu objects\n", accepted, refused, objects_in_all);
    return 0;
}
